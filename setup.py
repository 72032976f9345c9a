"""Packaging: name, loose version ranges, extras. requirements.txt pins the exact set that is tested."""

from pathlib import Path

from setuptools import setup

setup(
    name="avid",
    version="0.1.0",
    description="Self-supervised learning from video and sound: Robust-xID, temporal tasks, in PyTorch",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["avid", "avid.configs", "avid.tools"],
    package_data={"avid.configs": ["*.yaml"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        # one release of the three: torchvision pins torch; not 2.9, which computes conv3d in half precision
        # outside cuDNN, 10 to 20 times slower (pytorch#166643)
        "torch>=2.6,!=2.9.*,<2.12",
        "torchvision>=0.21,!=0.24.*,<0.27",
        "torchaudio>=2.6,!=2.9.*,<2.12",
        "decord2>=3.0,<4",  # the maintained build of the module `decord`
        "av>=14.2,<19",
        "numpy>=2.0,<3",
        "omegaconf>=2.3,<3",
        "scikit-learn>=1.5,<2",
        "matplotlib>=3.8,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.15,<3"],  # for log.tensorboard=true
        "dev": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "ruff>=0.12"],
        "parquet": ["pyarrow>=15"],  # for `python -m avid embed --format parquet`
        "prepare": ["imageio-ffmpeg>=0.6,<0.9"],  # an ffmpeg for `python -m avid prepare`; tested: 0.8.1
    },
)
