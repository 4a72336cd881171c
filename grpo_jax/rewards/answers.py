r"""Final answers: extraction from a completion, and comparison.

`extract` returns the answer that a text states, and `equivalent` compares two answers.
The implementation is in `grading/`.
"""

from grpo_jax.data.brackets import find_boxed as find_boxed
from grpo_jax.rewards.grading import worker_pool
from grpo_jax.rewards.grading.extraction import extract as extract
from grpo_jax.rewards.grading.extraction import final_part as final_part
from grpo_jax.rewards.grading.extraction import printed_answer as printed_answer
from grpo_jax.rewards.grading.extraction import stated_answer as stated_answer


def equivalent(prediction: str, reference: str) -> bool:
    r"""Returns whether a predicted answer equals the reference answer.

    Takes bounded time for any text. Rational answers are compared in the calling
    thread. Other answers are compared in worker processes, which are killed if they
    take too long.

    >>> equivalent(r"\dfrac{3}{6}", "0.5"), equivalent("20%", "20")
    (True, True)
    >>> equivalent("$12,000", "12000 dollars"), equivalent("3 cm", r"3\text{ cm}^2")
    (True, False)
    """
    return worker_pool.grade_answers([prediction], [reference])[0]
