"""Send one question to a running server at several scales, concurrently.

steer-engine serve smollm2-135m --steering-vectors vectors/ --enforce-eager
python examples/chat.py "How are you feeling today?"
"""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI

MODEL, VECTOR, SCALES = "smollm2-135m", "cheerful", (-0.3, 0.0, 0.3)


async def answer_at(client: AsyncOpenAI, question: str, scale: float) -> str:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=60,
        extra_body={"repetition_penalty": 1.1, "steering": {"edits": [{"vector": VECTOR, "scale": scale}]}},
    )
    return f"{scale:+g}: {answer.choices[0].message.content}"


async def main(question: str) -> None:
    async with AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="none") as client:
        for line in await asyncio.gather(*(answer_at(client, question, scale) for scale in SCALES)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "How are you feeling today?"))
