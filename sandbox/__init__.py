"""How one program of a model runs: in a throw-away child, behind the kernel's layers, with text as the only way out.

`lanes.Pool`, the trusted end, carries programs to its fork servers; `child` is such a server (a process of its own) and
its children; `layers` is the kernel's part, `literals` values as text. Nothing of this project outside this folder is
imported: no gold output can be where model code runs.
"""
