r"""Final answers: what a completion states, and whether two answers are the same.

`extract` reads the answer out of a text and `equivalent` compares two answers. The
parts are in `grading/`.
"""

from grpo_jax.data.brackets import boxed as boxed
from grpo_jax.rewards.grading import worker_pool
from grpo_jax.rewards.grading.extraction import extract as extract
from grpo_jax.rewards.grading.extraction import final_part as final_part
from grpo_jax.rewards.grading.extraction import printed as printed
from grpo_jax.rewards.grading.extraction import stated as stated


def equivalent(prediction: str, reference: str) -> bool:
    r"""Whether a predicted answer is the reference answer; never raises, bounded time.

    Rational answers are settled in the calling thread; all else, and so any hostile
    text, in the killable workers of `grading`.

    >>> equivalent(r"\dfrac{3}{6}", "0.5"), equivalent("20%", "20")
    (True, True)
    >>> equivalent("$12,000", "12000 dollars"), equivalent("3 cm", r"3\text{ cm}^2")
    (True, False)
    """
    return worker_pool.grade([prediction], [reference])[0]
