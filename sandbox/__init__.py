"""How one program of a model runs: in a throw-away child, behind the kernel's layers, with text as the only way out.

Public names: `lanes.Pool`, `lanes.Fork` and `lanes.Reply` (the trusted end), `literals` (values to text and back).
`child` is a process of its own. Nothing of this project outside this folder is imported: no gold output can be where
model code runs.
"""
