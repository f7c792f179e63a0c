"""Questions to trained studies: who converges when, who helps where, and at what cost."""
