"""Start a job on one host or a cluster, and find where a process stands in it. Standard library and PyYAML only."""
