"""`steer-engine serve` whose admission lets every number in, so that the second line of containment has work to do.

python unchecked_server.py serve MODEL [FLAG ...]
"""

from __future__ import annotations


def main() -> None:
    from steer_engine import resolve

    for name in ("check_growth", "check_dose", "check_representable"):
        setattr(resolve, name, lambda *args, **kwargs: None)
    from steer_engine.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
