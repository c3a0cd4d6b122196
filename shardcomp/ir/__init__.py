"""The program in hand between passes: graph, layouts, mesh, collectives, and how a program is run and printed."""
