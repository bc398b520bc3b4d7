"""`steer-engine doctor`: can this model be served steered, how, and what does it take?"""
