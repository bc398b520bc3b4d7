"""Steer from LangChain: by a preset's name as the model, or by the field in `extra_body`.

pip install langchain-openai
python examples/langchain_chat.py smollm2-135m cheerful "How are you feeling today?" [PRESET]
"""

from __future__ import annotations

import os
import sys

from langchain_openai import ChatOpenAI

URL = os.environ.get("STEER_ENGINE_URL", "http://localhost:8000")
SERVER = {"base_url": f"{URL}/v1", "api_key": os.environ.get("OPENAI_API_KEY", "none"), "temperature": 0}


def main(model: str, vector: str, question: str, preset: str | None = None) -> None:
    steering = {"edits": [{"vector": vector, "scale": 0.3}]}
    chats = {
        "plain": ChatOpenAI(model=model, max_tokens=60, **SERVER),
        "steered": ChatOpenAI(model=model, max_tokens=60, extra_body={"steering": steering}, **SERVER),
    }
    if preset is not None:
        # A preset is a model name, so an existing program needs no other change.
        chats["preset"] = ChatOpenAI(model=f"{model}:{preset}", max_tokens=60, **SERVER)
    for name, chat in chats.items():
        print(f"{name}: {chat.invoke(question).content!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
