"""One module per question, stated in its docstring. `measure(settings, progress, quick=...)` answers it."""
