"""Elementwise update rules transcribed from their papers in plain torch: one tensor at a time, one formula a line.

Each takes hyperparameters and yields from `update(theta, g, t, state)` the new parameter; t counts from 1, `state` is a dict.
"""

import math

import torch


class Transcription:
    """One parameter group. decay: "l2" adds it to the gradient, "decoupled" shrinks the parameter first."""

    decay = "decoupled"

    def __init__(self, params, lr, weight_decay=0.0, maximize=False, decoupled_weight_decay=None, **hyper):
        self.params, self.lr, self.wd, self.sign, self.t = list(params), lr, weight_decay, -1 if maximize else 1, 0
        self.states = [{} for _ in self.params]
        if decoupled_weight_decay is not None:
            self.decay = "decoupled" if decoupled_weight_decay else "l2"
        self.__dict__.update(hyper)

    @torch.no_grad()
    def step(self):
        self.t += 1
        for p, state in zip(self.params, self.states, strict=True):
            theta, g = p.detach().clone(), self.sign * p.grad
            if self.decay == "l2":
                g = g + self.wd * theta
            elif self.decays():
                theta = theta * (1 - self.lr * self.wd)
            p.copy_(self.update(theta, g, self.t, state))

    def decays(self) -> bool:
        return True


def ema(state, name, x, beta):
    state[name] = beta * state.get(name, torch.zeros_like(x)) + (1 - beta) * x
    return state[name]


class AdaBound(Transcription):
    """arXiv 1902.09843, algorithms 2 and 3, with bias correction and without 1 / sqrt(t)."""

    decay = "l2"
    betas, final_lr, gamma, eps, amsbound, base_lr = (0.9, 0.999), 0.1, 1e-3, 1e-8, False, None

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        if self.amsbound:
            v = state["v_max"] = torch.max(state.get("v_max", torch.zeros_like(v)), v)
        final = self.final_lr * self.lr / (self.base_lr or self.lr)
        lower, upper = final * (1 - 1 / (self.gamma * t + 1)), final * (1 + 1 / (self.gamma * t))
        size = self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) / (v.sqrt() + self.eps)
        return theta - torch.clip(size, lower, upper) * m


class DiffGrad(Transcription):
    """arXiv 1909.11015, algorithm 1."""

    decay = "l2"
    betas, eps = (0.9, 0.999), 1e-8

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        change = (state.get("g", torch.zeros_like(g)) - g).abs()
        state["g"] = g
        friction = 1 / (1 + torch.exp(-change))
        return theta - self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) * friction * m / (v.sqrt() + self.eps)


class ADOPT(Transcription):
    """arXiv 2411.02853, algorithm 2, and its code's clipping by the number of finished steps to the power of 1/4."""

    decay = "l2"
    betas, eps, clip_exponent = (0.9, 0.9999), 1e-6, 0.25

    def decays(self):
        return self.t > 1

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        if t == 1:
            state["v"] = g * g
            return theta
        q = g / torch.clamp(state["v"].sqrt(), min=self.eps)
        if self.clip_exponent is not None:
            bound = (t - 1) ** self.clip_exponent
            q = torch.clip(q, -bound, bound)
        m = ema(state, "m", q, b1)
        ema(state, "v", g * g, b2)
        return theta - self.lr * m


class Grams(Transcription):
    """arXiv 2412.17107, algorithm 1."""

    betas, eps = (0.9, 0.999), 1e-6

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        size = self.lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        return theta - size * torch.sign(g) * m.abs() / (v.sqrt() + self.eps)


class AdaMomentum(Transcription):
    """arXiv 2106.11514, algorithm 1."""

    betas, eps = (0.9, 0.999), 1e-8

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m = ema(state, "m", g, b1)
        s = state["s"] = b2 * state.get("s", torch.zeros_like(m)) + (1 - b2) * m * m + self.eps
        return theta - self.lr * (m / (1 - b1**t)) / (s / (1 - b2**t)).sqrt()


class EXAdam(Transcription):
    """arXiv 2412.20302, algorithm 1; dynamic_step is its growing step size."""

    betas, eps, dynamic_step = (0.9, 0.999), 1e-8, False

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        d1 = 1 + v / (v + self.eps) * b2**t
        d2 = 1 + m * m / (m * m + self.eps) * b1**t
        m_tilde, g_tilde, v_tilde = m / (1 - b1**t) * d1, g / (1 - b1**t) * d1, v / (1 - b2**t) * d2
        lr = self.lr * (math.log(math.sqrt(2) * math.sqrt(t + 1)) if self.dynamic_step else 1)
        return theta - lr * (m_tilde + g_tilde) / (v_tilde.sqrt() + self.eps)


class AdEMAMix(Transcription):
    """arXiv 2409.03137, algorithm 1, with the schedules of the authors' code (half-lives that grow linearly)."""

    betas, alpha, beta3_warmup, alpha_warmup, eps = (0.9, 0.999, 0.9999), 2.0, None, None, 1e-8

    def update(self, theta, g, t, state):
        b1, b2, b3 = self.betas
        alpha = self.alpha
        if self.alpha_warmup is not None:
            alpha = min(t / self.alpha_warmup * alpha, alpha)
        if self.beta3_warmup is not None and t < self.beta3_warmup:
            start, end = (math.log(0.5) / math.log(b + 1e-8) - 1 for b in (b1, b3))
            life = (1 - t / self.beta3_warmup) * start + t / self.beta3_warmup * end
            b3 = math.pow(0.5, 1 / (life + 1))
        fast, slow, v = ema(state, "fast", g, b1), ema(state, "slow", g, b3), ema(state, "v", g * g, b2)
        return theta - self.lr * (fast / (1 - b1**t) + alpha * slow) / ((v / (1 - b2**t)).sqrt() + self.eps)


class INNAprop(Transcription):
    """arXiv 2410.05871, algorithm 1."""

    alpha, beta, sigma, eps = 0.1, 0.9, 0.999, 1e-8

    def step(self):
        for p, state in zip(self.params, self.states, strict=True):
            state.setdefault("psi", (1 - self.alpha * self.beta) * p.detach())
        super().step()

    def update(self, theta, g, t, state):
        a, b, lr = self.alpha, self.beta, self.lr
        root = (ema(state, "v", g * g, self.sigma) / (1 - self.sigma**t)).sqrt() + self.eps
        psi = state["psi"] = (1 - lr / b) * state["psi"] + lr * (1 / b - a) * theta
        return (1 + lr * (1 - a * b) / (b - lr)) * theta - lr / (b - lr) * psi - lr * b * g / root


class OptAMSGrad(Transcription):
    """arXiv 1903.01435, algorithm 2; the prediction of the next gradient is the last one."""

    decay = "l2"
    betas, eps = (0.9, 0.999), 1e-8

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        w = state.get("w", theta)
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        v_max = state["v_max"] = torch.max(state.get("v_max", torch.zeros_like(v)), v)
        w = state["w"] = w - self.lr * m / (v_max.sqrt() + self.eps)
        h = b1 * m + (1 - b1) * g
        return w - self.lr * h / (v_max.sqrt() + self.eps)


class ScheduleFree(Transcription):
    """arXiv 2405.15682, equations 3 to 5 with the weights of algorithm 1; the parameter is y."""

    decay = "rule"
    momentum, warmup_steps, weight_lr_power, betas, total, weight = 0.9, 0, 2.0, None, 0.0, 0.0

    def step(self):
        self.rate = self.lr * min((self.t + 1) / max(self.warmup_steps, 1), 1)
        self.weight = self.rate**self.weight_lr_power
        self.total += self.weight
        super().step()

    def decays(self):
        return False

    def scaled(self, g, t, state):
        return g

    def update(self, theta, g, t, state):
        beta, c = self.betas[0] if self.betas else self.momentum, self.weight / self.total
        x, z = state.get("x", theta), state.get("z", theta)
        z = state["z"] = z - self.rate * (self.scaled(g, t, state) + self.wd * theta)
        x = state["x"] = (1 - c) * x + c * z
        return (1 - beta) * z + beta * x


class ScheduleFreeAdamW(ScheduleFree):
    """The same on gradients scaled as in Adam, with its bias correction."""

    betas, eps = (0.9, 0.999), 1e-8

    def scaled(self, g, t, state):
        v = ema(state, "v", g * g, self.betas[1])
        return g / ((v / (1 - self.betas[1] ** t)).sqrt() + self.eps)


def cautiously(u, g, form):
    """arXiv 2411.16085, algorithm 1; "mean" and "count" are the normalisations of its code for AdamW and for Lion."""
    mask = (u * g > 0).to(g.dtype)
    scale = 1 / torch.clamp(mask.mean(), min=1e-3) if form == "mean" else mask.numel() / (mask.sum() + 1)
    return u * mask * scale


class CautiousAdamW(Transcription):
    """arXiv 2411.16085, algorithm 2."""

    betas, eps, amsgrad, cautious = (0.9, 0.999), 1e-8, False, True

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
        if self.amsgrad:
            v = state["v_max"] = torch.max(state.get("v_max", torch.zeros_like(v)), v)
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return theta - self.lr * cautiously(u, g, "mean" if self.cautious is True else self.cautious)


class CautiousAdam(CautiousAdamW):
    decay = "l2"


class CautiousLion(Transcription):
    """arXiv 2411.16085, Lion of table 1."""

    betas, cautious = (0.9, 0.99), True

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        m = state.get("m", torch.zeros_like(g))
        u = torch.sign(b1 * m + (1 - b1) * g)
        ema(state, "m", g, b2)
        return theta - self.lr * cautiously(u, g, "count" if self.cautious is True else self.cautious)


class LaProp(Transcription):
    """arXiv 2002.04839, algorithm 1, with the flags of its code."""

    betas, eps, amsgrad, centered, centered_after = (0.9, 0.999), 1e-15, False, False, 10

    def update(self, theta, g, t, state):
        b1, b2 = self.betas
        w, n = ema(state, "v", g * g, b2), ema(state, "n", g, b2)
        if self.centered and t > self.centered_after:
            w = torch.clamp(w - n * n, min=0)
        if self.amsgrad:
            w = state["v_max"] = torch.max(state.get("v_max", torch.zeros_like(w)), w)
        m = ema(state, "m", g / ((w / (1 - b2**t)).sqrt() + self.eps), b1)
        return theta - self.lr * m / (1 - b1**t)


class Muon(Transcription):
    """Jordan et al. 2024 in torch's form: matrices along the orthogonal factor of their momentum, others by AdamW."""

    momentum, nesterov, eps, ns_steps, adjust_lr_fn = 0.95, True, 1e-7, 5, None
    ns_coefficients, adam_lr, adam_betas, adam_eps = (3.4445, -4.7750, 2.0315), None, (0.9, 0.95), 1e-8

    def decays(self):
        return False

    def update(self, theta, g, t, state):
        if theta.dim() < 2:
            lr, (b1, b2) = self.adam_lr or self.lr, self.adam_betas
            m, v = ema(state, "m", g, b1), ema(state, "v", g * g, b2)
            step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.adam_eps)
            return (1 - lr * self.wd) * theta - lr * step
        b = ema(state, "b", g, self.momentum)
        u = (1 - self.momentum) * g + self.momentum * b if self.nesterov else b
        u = u.reshape(u.shape[0], -1)
        rows, cols = u.shape
        x = u / max(float(u.norm()), self.eps)
        ca, cb, cc = self.ns_coefficients
        for _ in range(self.ns_steps):
            x = ca * x + cb * (x @ x.T) @ x + cc * (x @ x.T) @ (x @ x.T) @ x
        size = {
            None: max(1, rows / cols) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
            "none": 1.0,
        }[self.adjust_lr_fn]
        return (1 - self.lr * self.wd) * theta - self.lr * size * x.view(theta.shape)


class RMSpropTF(Transcription):
    """TensorFlow's RMSprop: means move by a share of the difference, eps under the root, lr in the buffer."""

    decay = "l2"
    alpha, eps, momentum, centered, lr_in_momentum = 0.9, 1e-10, 0.0, False, True

    def update(self, theta, g, t, state):
        v, a = state.get("v", torch.ones_like(g)), state.get("a", torch.zeros_like(g))
        v, a = v + (1 - self.alpha) * (g * g - v), a + (1 - self.alpha) * (g - a)
        state["v"], state["a"] = v, a
        d = g / (v - a * a + self.eps if self.centered else v + self.eps).sqrt()
        inside, outside = (self.lr, 1.0) if self.lr_in_momentum else (1.0, self.lr)
        b = state["b"] = self.momentum * state.get("b", torch.zeros_like(g)) + inside * d
        return theta - outside * b


class FedAdam(Transcription):
    """arXiv 2003.00295, algorithm 2: the server's three second moments; g is minus the clients' mean change."""

    decay = "l2"
    betas, tau = (0.9, 0.99), 1e-3

    def second(self, v, g):
        return self.betas[1] * v + (1 - self.betas[1]) * g * g

    def update(self, theta, g, t, state):
        m = ema(state, "m", -g, self.betas[0])
        v = state["v"] = self.second(state.get("v", torch.full_like(g, self.tau**2)), g)
        return theta + self.lr * m / (v.sqrt() + self.tau)


class FedYogi(FedAdam):
    def second(self, v, g):
        return v - (1 - self.betas[1]) * g * g * torch.sign(v - g * g)


class FedAdagrad(FedAdam):
    def __init__(self, params, beta1=0.0, **options):
        super().__init__(params, betas=(beta1, None), **options)

    def second(self, v, g):
        return v + g * g
