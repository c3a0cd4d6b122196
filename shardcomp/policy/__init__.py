"""Policies: what a user asks for. `Policy` is read from a TOML file, from options and from flags, and checked as a whole.

`policy` has the class, `toml_reader` reads files, `options` has every option with its legal values and its flag, `patterns` the
patterns of module paths, and `auto` derives a policy from a model that has none.
"""

from shardcomp.policy.options import Options, add_option_flags, flags, options_from
from shardcomp.policy.patterns import Entry
from shardcomp.policy.policy import Policy

__all__ = ["Entry", "Options", "Policy", "add_option_flags", "flags", "options_from"]
