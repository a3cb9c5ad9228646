"""How one program of a model runs: in a throw-away child, behind the kernel's layers, with text as the only way out.

Public names: `lanes.Lane` (the trusted end), `literals` (values to text and back). `child` is a process of its own.
It never imports anything of this project outside this folder: no gold output can be where model code runs.
"""
