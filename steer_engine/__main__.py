"""`python -m steer_engine` is `steer-engine`."""

from steer_engine.cli import main

main()
