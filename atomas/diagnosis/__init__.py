"""Whether a node, and all nodes together, can run a job: checks that each say what to do."""
