"""TLS between machines, by a relay beside each role: certificates, the relay, and a role's ends of it."""
