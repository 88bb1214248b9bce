"""A reward of one's own: a number for a response, found by `reward.functions` as `my_rewards:concise`."""


def concise(*, prompt: str, response: str, answer: str) -> float:
    """1 for an answer in a few words."""
    return float(answer in response and len(response) < 30)
