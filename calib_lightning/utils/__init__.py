"""Files, seeding, registry, configuration search and run folders: what every other part may use."""
