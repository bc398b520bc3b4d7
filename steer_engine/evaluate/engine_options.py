"""Options that all commands of this package have."""

from __future__ import annotations

import typer

MODEL = typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")
DTYPE = typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")
TASK = typer.Option(help="ioi, babi15, babi16, or a JSONL file.")
OUT = typer.Option(help="Folder for results, report and what a stopped run goes on from.")
BLOCKS = typer.Option(help="Blocks to try, such as 15 or 10-19; may be repeated.")
ALPHAS = typer.Option(help="Strengths: first:last:step, or a list with commas.")
UNIT = typer.Option(help="Of strengths: `vector`, or `residual` norms.")
SCOPE = typer.Option(help="Positions steered: all, prompt or generation.")
SCORE = typer.Option(help="Maximised on validation: accuracy or share_correct.")
DERIVE_ITEMS = typer.Option(min=2, help="Items that vectors are derived from.")
VALIDATION_ITEMS = typer.Option(min=2, help="Items that blocks and strength are chosen on.")
TEST_ITEMS = typer.Option(min=2, help="Items that the result is reported on.")
SHOTS = typer.Option(min=0, help="Solved examples before each prompt.")
CHAT = typer.Option("--chat", help="Prompts go through the model's chat template.")
SEED = typer.Option(help="Of items, contrasts and controls.")
MAX_MODEL_LEN = typer.Option(min=2, help="Longest prompt in tokens (default: what the model says).")
TENSOR_PARALLEL = typer.Option(min=1, help="GPUs that the engine is split over.")
