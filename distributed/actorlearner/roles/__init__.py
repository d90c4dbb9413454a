"""The four processes. None imports another, or an algorithm; they meet at the edges."""
