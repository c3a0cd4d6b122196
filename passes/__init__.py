"""The passes, one file each, named for what it does: `CONTRACT` and `run(program, context) -> Program`.

`shardcomp.lowering.PASSES` is their order, `shardcomp.pass_runner` runs them.
"""
