"""The sub-commands of `atomas`: each module registers its arguments and imports what is heavy only when run."""
