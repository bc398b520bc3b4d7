"""Steer from LangChain: by a preset's name as the model, or by the field in `extra_body`.

pip install langchain-openai
python examples/langchain_chat.py smollm2-135m cheerful "How are you feeling today?"
"""

from __future__ import annotations

import sys

from langchain_openai import ChatOpenAI

SERVER = {"base_url": "http://localhost:8000/v1", "api_key": "none", "temperature": 0, "max_tokens": 60}


def main(model: str, vector: str, question: str) -> None:
    plain = ChatOpenAI(model=model, **SERVER)
    steering = {"edits": [{"vector": vector, "scale": 0.3}]}
    steered = ChatOpenAI(model=model, extra_body={"steering": steering}, **SERVER)
    for name, chat in (("plain", plain), ("steered", steered)):
        print(f"{name}: {chat.invoke(question).content}")
    # A preset is a model of its own: nothing else has to change in a program that is there already.
    #   ChatOpenAI(model=f"{model}:calm", **SERVER)


if __name__ == "__main__":
    main(*sys.argv[1:4])
