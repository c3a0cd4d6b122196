"""Policy files, one for each model family: `shardcomp.Policy.load(name)` finds them here by their name."""
