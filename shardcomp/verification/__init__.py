"""A plan against the unmodified dense model.

`verifier` compares the two (`compare` has the tolerances). The model runs in `dense_model`, and the plan in `sharded_model`, on
ranks that are threads (`thread_ranks`). `mutants` are deliberately wrong programs that must be noticed. `resumption` kills runs
of a plan and resumes them.
"""
