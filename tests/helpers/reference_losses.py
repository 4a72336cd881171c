"""A second, plain implementation of the losses: numpy, float64, loops, no autodiff.

In: the arguments of `grpo_loss` as arrays, and the sequences as lists of positions.
Out: the loss, its gradient with respect to logps (derived by hand) and the metrics.
Written from the paper's equations and the definitions of the methods' papers, not from
the package, so that an error must be made twice to go unseen.
"""

import math

import numpy as np


def rows_of(mask):
    """Every row is a sequence: [[(b, t), ...] for each b], unmasked positions only."""
    B, T = mask.shape
    return [[(b, t) for t in range(T) if mask[b, t]] for b in range(B)]


def grpo(
    logps,
    advantages,
    mask,
    *,
    old_logps=None,
    ref_logps=None,
    weights=None,
    sampler_logps=None,
    importance_cap=math.inf,
    entropy=None,
    entropy_coef=0.0,
    sequences=None,
    num_sequences=None,
    normalizer=None,
    clip_low=0.2,
    clip_high=None,
    delta=None,
    kl_coef=0.04,
    kl_estimator="k3",
    aggregate="sequence_mean",
    max_length=0,
    importance="token",
    surrogate="clip",
):
    """(loss, d loss / d logps [B, T], metrics). mask may hold fractions."""
    logps = np.asarray(logps, np.float64)
    old = logps if old_logps is None else np.asarray(old_logps, np.float64)
    clip_high = clip_low if clip_high is None else clip_high
    sequences = rows_of(mask) if sequences is None else sequences
    num_sequences = len(sequences) if num_sequences is None else num_sequences
    tokens = sum(float(mask[p]) for o in sequences for p in o)

    loss = policy_loss = kl_sum = low = high = entropy_sum = 0.0
    ratios = []
    gradient = np.zeros(logps.shape)
    for o in sequences:
        n = max(sum(float(mask[p]) for p in o), 1.0)
        if aggregate == "sequence_mean":
            divisor = n * (normalizer or max(num_sequences, 1))
        elif aggregate == "token_mean":
            divisor = normalizer or max(tokens, 1.0)
        else:
            divisor = normalizer or max(num_sequences, 1)
            divisor *= 1 if aggregate == "sequence_sum" else max_length
        mean_log_ratio = sum(float(mask[p]) * (logps[p] - old[p]) for p in o) / n
        through_ratio = 0.0  # d loss / d ρ_i, summed over the tokens that share ρ_i
        for p in o:
            m = float(mask[p])
            a = float(advantages[p] if advantages.ndim == 2 else advantages[p[0]])
            w = 1.0 if weights is None else float(weights[p])
            if sampler_logps is not None:
                ratios.append(min(math.exp(old[p] - sampler_logps[p]), importance_cap))
                w *= ratios[-1]
            share = importance == "sequence"
            ratio = math.exp(mean_log_ratio if share else logps[p] - old[p])

            # the policy term, and its slopes in ρ and in log π_θ itself
            by_ratio = by_logp = 0.0
            if surrogate == "cispo":
                by_logp = -min(ratio, clip_high) * a
                policy = by_logp * logps[p]
            else:
                bounded = ratio if delta is None else min(ratio, delta)
                clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
                policy = -min(bounded * a, clipped * a)
                if bounded * a <= clipped * a:
                    moves = delta is None or ratio < delta
                else:
                    moves = 1 - clip_low < ratio < 1 + clip_high
                by_ratio = -a if moves else 0.0
            low += m * (surrogate == "clip" and ratio < 1 - clip_low and a < 0)
            bound = clip_high if surrogate == "cispo" else 1 + clip_high
            high += m * (ratio > bound and a > 0)
            policy, by_ratio, by_logp = w * policy, w * by_ratio, w * by_logp
            policy_loss += m * policy / divisor

            kl = 0.0
            if ref_logps is not None:
                d = float(ref_logps[p]) - logps[p]
                k3, k3_slope = math.exp(d) - d - 1, 1 - math.exp(d)
                if kl_estimator == "k1":
                    kl, slope = -d, 1.0
                elif kl_estimator == "k2":
                    kl, slope = d * d / 2, -d
                elif kl_estimator == "k3":
                    kl, slope = k3, k3_slope
                else:
                    kl, slope = ratio * k3, ratio * k3_slope
                    by_ratio += kl_coef * k3
                by_logp += kl_coef * slope
            if entropy is not None:
                loss -= m * entropy_coef * float(entropy[p]) / divisor
                entropy_sum += m * float(entropy[p])
            kl_sum += m * kl
            loss += m * (policy + kl_coef * kl) / divisor
            gradient[p] += m * by_logp / divisor
            if share:
                through_ratio += m * by_ratio / divisor
            else:
                gradient[p] += m * by_ratio * ratio / divisor
        for p in o:  # d ρ_i / d log π_θ(t) = ρ_i m_t / n_i
            gradient[p] += through_ratio * math.exp(mean_log_ratio) * float(mask[p]) / n

    count = max(tokens, 1.0)
    metrics = {
        "policy_loss": policy_loss,
        "clip_ratio/low_mean": low / count,
        "clip_ratio/high_mean": high / count,
        "clip_ratio/region_mean": (low + high) / count,
        "num_tokens": tokens,
    }
    if ref_logps is not None:
        metrics["kl"] = kl_sum / count
    if entropy is not None:
        metrics["entropy"] = entropy_sum / count
    if sampler_logps is not None:
        kept = [float(mask[p]) for o in sequences for p in o]
        mean = sum(m * w for m, w in zip(kept, ratios, strict=True)) / count
        for name, value in dict(min=min(ratios), mean=mean, max=max(ratios)).items():
            metrics[f"sampling/importance_sampling_ratio/{name}"] = value
    return loss, gradient, metrics


def group_advantages(
    rewards, group_size, *, scale="group", baseline="mean", ddof=1, eps=1e-4
):
    """Â, one reward at a time; unscored (NaN) rewards take no part and get 0."""

    def std(values):
        mean = sum(values) / len(values)
        squares = sum((r - mean) ** 2 for r in values)
        return math.sqrt(squares / max(len(values) - ddof, 1))

    scored = [float(r) for r in rewards if not math.isnan(r)]
    advantages = []
    for i, reward in enumerate(rewards):
        start = i - i % group_size
        group = [float(r) for r in rewards[start : start + group_size] if r == r]
        if math.isnan(reward) or len(group) < 2 or min(group) == max(group):
            advantages.append(0.0)
            continue
        center = sum(group) / len(group)
        if baseline == "leave_one_out":
            center = (sum(group) - float(reward)) / (len(group) - 1)
        advantage = float(reward) - center
        if scale != "none":
            advantage /= std(group if scale == "group" else scored) + eps
        advantages.append(advantage)
    return np.array(advantages)


def process_advantages(step_rewards, step_mask, group_size, *, ddof=1, eps=1e-4):
    """Section 4.1.3, a group, a step and a token at a time."""
    N, T = step_rewards.shape
    advantages = np.zeros((N, T))
    for first in range(0, N, group_size):
        steps = [
            (i, t, float(step_rewards[i, t]))
            for i in range(first, first + group_size)
            for t in range(T)
            if step_mask[i, t] and math.isfinite(step_rewards[i, t])
        ]
        rewards = [r for _, _, r in steps]
        if len(rewards) < 2 or min(rewards) == max(rewards):
            continue
        mean = sum(rewards) / len(rewards)
        squares = sum((r - mean) ** 2 for r in rewards)
        std = math.sqrt(squares / (len(rewards) - ddof))
        for i, end, r in steps:
            for t in range(end + 1):
                advantages[i, t] += (r - mean) / (std + eps)
    return advantages


def gae(rewards, values, mask, *, gamma=1.0, lam=1.0):
    """A_t = Σ_k (γλ)^k δ_t+k over the unmasked tokens of a row, and R = A + V."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(len(rewards)):
        kept = [t for t in range(rewards.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in kept] + [0.0]
        errors = [
            float(rewards[b, t]) + gamma * v[j + 1] - v[j] for j, t in enumerate(kept)
        ]
        for j, t in enumerate(kept):
            advantages[b, t] = sum(
                (gamma * lam) ** k * error for k, error in enumerate(errors[j:])
            )
            returns[b, t] = advantages[b, t] + v[j]
    return advantages, returns


def decoupled_advantages(rewards, weights, group_size, *, eps=1e-4):
    """Each column's group advantages, weighted and summed, over their std (ddof 1)."""
    columns = [group_advantages(r, group_size, eps=eps) for r in rewards.T]
    total = np.array(weights) @ np.array(columns)
    kept = [a for a, r in zip(total, rewards, strict=True) if np.isfinite(r).any()]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((a - mean) ** 2 for a in kept) / (len(kept) - 1))
    moved = np.any(columns, axis=0)
    return total, np.where(moved, (total - mean) / (std + eps), 0)
