"""The device and the versions that a figure depends on."""

import importlib.metadata

import torch

PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def environment(*more: str) -> dict[str, str]:
    """The device, and the version of each package, of `more` too."""
    versions = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for package in PACKAGES + more:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
