"""How a corpus is built: planned, examined in parts, resolved as a whole, written shard by shard.

    plan.py       what is built from which files, and the folder in which the work is done
    engine.py     runs the tasks of a stage on this node or in Slurm, but for those that are done
    executors.py  datatrove's part in that
    examine.py    stages 1 and 2: files into parts, rows into records and identities
    resolve.py    stage 3: what only the whole corpus knows: duplicates, leakage, splits, shards
    assemble.py   stage 4: shards, rejected rows, alignment check

A task writes under a name of its own and renames it when it is complete, so that one that was killed can run again.
"""
