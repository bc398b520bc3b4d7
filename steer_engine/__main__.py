"""`python -m steer_engine` runs the command `steer-engine`."""

from steer_engine.cli.main import main

main()
