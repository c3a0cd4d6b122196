"""What a lowered model can be asked, offline: its listing, what a pass changed, and a report on one rank."""
