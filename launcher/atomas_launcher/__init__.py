"""Where a process stands in a job, whichever launcher started it. Standard library and PyYAML only."""
