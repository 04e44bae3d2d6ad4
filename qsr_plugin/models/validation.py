"""Validation of a quantized network in the host's loop: whole images or patches, average bits, ranges."""

from __future__ import annotations

import torch
from basicsr.utils import get_root_logger

from qsr_plugin.data.patches import run_in_patches
from qsr_plugin.quant.depth import set_depth
from qsr_plugin.report.fab import feature_average_bits


class Validation:
    """Mixin of the model: ``val.patches``, ``val.depth``, FAB beside the host's metrics, and how ranges stand."""

    def validation(self, dataloader, current_iter: int, tb_logger, save_img: bool = False) -> None:
        """Validate as the host does, with random states left as they were, and log FAB and ranges."""
        self._bits: list[float] = []
        self.net.drop_pairs()  # a whole image's would take many times a training step's memory
        with torch.random.fork_rng():
            super().validation(dataloader, current_iter, tb_logger, save_img)
        if self.opt["rank"] == 0:
            self.log_ranges(current_iter, tb_logger)

    def test(self) -> None:
        """Super-resolve the current image, whole or in the patches of ``val.patches``, and note its average bits."""
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.net
        modes, options = {module: module.training for module in net.modules()}, self.opt["val"]
        patches, bits = options.get("patches"), []
        net.eval()
        if options.get("depth"):
            set_depth(net, options["depth"])

        def observed(x: torch.Tensor) -> torch.Tensor:
            out = net(x)
            bits.append(feature_average_bits(net, net.last_record()))
            return out

        with torch.no_grad():
            scale = self.opt["scale"]
            self.output = run_in_patches(observed, self.lq, scale, **patches) if patches else observed(self.lq)
        if options.get("depth"):
            set_depth(net, None)
        for module, mode in modes.items():  # frozen batch norm layers stay frozen
            module.training = mode
        self._bits.append(sum(bits) / len(bits))

    def _log_validation_metric_values(self, current_iter: int, dataset_name: str, tb_logger) -> None:
        super()._log_validation_metric_values(current_iter, dataset_name, tb_logger)
        fab = sum(self._bits) / len(self._bits)
        get_root_logger().info(f"\t # FAB {dataset_name}: {fab:.3f}")
        if tb_logger:
            tb_logger.add_scalar(f"metrics/{dataset_name}/fab", fab, current_iter)

    def log_ranges(self, current_iter: int, tb_logger) -> None:
        """The ranges at the last logged training step: one line each in the log, one scalar each in TensorBoard."""
        statistics = getattr(self, "range_statistics", None)
        if statistics is None:
            return
        get_root_logger().info("Ranges on a training batch:\n\t" + "\n\t".join(statistics.lines()))
        if tb_logger:
            for name, value in statistics.scalars().items():
                tb_logger.add_scalar(name, value, current_iter)
        self.range_statistics = None
