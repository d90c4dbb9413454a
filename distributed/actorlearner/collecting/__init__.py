"""The inside of the collect actor: its environments and replay, the policy that acts, its reports."""
