"""What several tests share: engines, oracles, servers, random requests."""
