"""The rival's training step: LLaDA's published loss in plain PyTorch, clipping and fused AdamW.

    trainer = Trainer(config, params)            # a Config and the parameter tree of `llada.model.transformer`
    loss, norm = trainer.step(xt_BL, x0_BL, masked_BL, p_B)

It does the work of the published formulation (github.com/ML-GSAI/LLaDA, GUIDELINES.md): logits of all positions, then
those of the masked ones, their cross-entropy over p, the sum over B x L. Where the published code leaves a choice, it
takes the fastest that PyTorch offers: scaled_dot_product_attention, fused AdamW, no synchronisation before the end of
the step. Masks are inputs, so that both programs see the same ones; drawing them costs this one nothing.
Shapes: B sequences, L tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
import torch_reference

from llada.config import Config


def bound(logits_BLV: torch.Tensor, x0_BL: torch.Tensor, masked_BL: torch.Tensor, p_BL: torch.Tensor) -> torch.Tensor:
    """The published loss, in nats per token."""
    nats = F.cross_entropy(logits_BLV[masked_BL].float(), x0_BL[masked_BL], reduction="none") / p_BL[masked_BL]
    return nats.sum() / x0_BL.numel()


class Trainer:
    """A model, its optimizer and the step that moves them; `compiled` puts forward and loss through torch.compile."""

    def __init__(self, config: Config, params: dict, compiled: bool = False, device: str = "cpu", dtype=torch.float32):
        o = config.optimizer
        self.device, self.dtype, self.clip_norm = device, dtype, o.clip_norm
        self.model = torch_reference.from_jax(config.model, params).train().requires_grad_(True).to(device)
        named = dict(self.model.named_parameters())
        groups = [  # norm scales are not decayed
            dict(params=[p for name, p in named.items() if "norm" not in name], weight_decay=o.weight_decay),
            dict(params=[p for name, p in named.items() if "norm" in name], weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.peak_learning_rate, betas=(o.beta1, o.beta2), eps=o.adam_eps, fused=True
        )
        self.loss = self._loss
        if compiled:
            # The number of masked positions differs at every step: a dynamic shape avoids recompiling for each.
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
            self.loss = torch.compile(self._loss)

    def _loss(self, xt_BL, x0_BL, masked_BL, p_BL):
        return bound(self.model(xt_BL), x0_BL, masked_BL, p_BL)

    def gradients(self, xt_BL, x0_BL, masked_BL, p_B) -> torch.Tensor:
        """Forward and backward; the loss. Arrays may be NumPy arrays."""
        as_ids = dict(dtype=torch.long, device=self.device)
        x0_BL, xt_BL = torch.as_tensor(np.array(x0_BL), **as_ids), torch.as_tensor(np.array(xt_BL), **as_ids)
        masked_BL = torch.as_tensor(np.array(masked_BL), device=self.device)
        p_BL = torch.as_tensor(np.array(p_B), device=self.device)[:, None].expand(x0_BL.shape)
        self.optimizer.zero_grad(set_to_none=True)
        # Weights stay float32 and products take bfloat16, as with mixed precision anywhere; float32 needs no cast.
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(xt_BL, x0_BL, masked_BL, p_BL)
        loss.backward()
        return loss.detach()

    def step(self, xt_BL, x0_BL, masked_BL, p_B) -> tuple[float, float]:
        """One optimizer step: `(loss in nats per token, gradient norm before clipping)`."""
        loss = self.gradients(xt_BL, x0_BL, masked_BL, p_B)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item(), norm.item()

    def first_moments(self) -> dict[str, torch.Tensor]:
        """AdamW's first moments by parameter name: after one step, 1 - beta1 times the clipped gradient."""
        return {name: self.optimizer.state[p]["exp_avg"] for name, p in self.model.named_parameters()}
