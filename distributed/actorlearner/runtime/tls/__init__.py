"""TLS between machines, through a relay for each role: certificates, the relay, and a role's tunnels."""
