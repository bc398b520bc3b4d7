"""What the demo asks.

Scales and blocks were chosen by looking at answers to DEV; SHOWN and HELD_OUT were only ever run with the choice.
"""

from __future__ import annotations

DEV = (
    "How was your weekend?",
    "Describe the view from your window.",
    "What do you think about your neighbours?",
    "Tell me about the last film you saw.",
    "How did you sleep last night?",
    "What is your garden like in the spring?",
    "Tell me about your best friend.",
    "What happened at the shop today?",
    "How is your new flat?",
    "What do you expect from the meeting?",
)

SHOWN = (
    "How are you feeling today?",
    "What is it like to live in a small town?",
    "Tell me about the weather this week.",
)

HELD_OUT = (
    "Tell me about your day.",
    "How is your job going?",
    "What was your childhood like?",
    "Describe your breakfast this morning.",
    "What do you think about winter?",
    "How was the train ride?",
    "Tell me about your family.",
    "What is your house like?",
    "How did the exam go?",
    "Describe a walk in the park.",
    "What do you remember about school?",
    "How is the food at that restaurant?",
    "Tell me about your holiday.",
    "What happened on your birthday?",
    "How do you feel about Mondays?",
    "Describe your last visit to the doctor.",
    "What is your town like at night?",
    "Tell me about your dog.",
    "How was the concert?",
    "What do you see in your future?",
)
