"""Demonstrations on the tiny models' alphabet, and a module with the reward that tells what they are good at."""

VOWELS = """
def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
"""
DEMONSTRATIONS = [{"prompt": f"say {n}", "completion": f" {'aeiou'[n % 5]} yes"} for n in range(20)]
