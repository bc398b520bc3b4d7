"""One module a question: its docstring's first line asks it, `ask(settings, progress, quick=...)` answers it."""
