"""The Atomas model: T5 backbone, adaptive polymerisation, hierarchical alignment, momentum contrast."""
