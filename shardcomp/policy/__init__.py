"""Policies: what a user asks for. `Policy` is read from a TOML file, from options and from flags, and checked as a whole."""

from shardcomp.policy.policy import Policy

__all__ = ["Policy"]
