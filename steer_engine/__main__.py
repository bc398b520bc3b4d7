"""`python -m steer_engine` is `steer-engine`."""

from steer_engine.cli.main import main

main()
