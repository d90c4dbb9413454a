"""The four processes. No role imports another role or an algorithm; they meet at the edges."""
