"""A DiT-S/2 on the pixels of CIFAR-10 by flow matching: python train.py cifar10_flow

Hardware: one GPU. TFDS downloads the data, 170 MB, the first time. 200 million images, as the best
published models of CIFAR-10 take, of which transformers overfit without augmentation:
by plan.py's bound of 27,230 images/s at least 2 hours of an H100, and 5 at 40 % MFU. Not run yet.
"""

from dit.config import PRESETS, Config, Data, Model, Objective, Optim, Train

config = Config(
    name="cifar10_flow",
    model=Model(**PRESETS["DiT-S/2"], remat="dots"),
    # JiT's times on pixels, of more noise; its t runs the other way, so that its mean is -0.8
    objective=Objective(name="flow", time_mean=0.8, time_std=0.8),
    data=Data(name="cifar10", image_size=32, channels=3, num_classes=10, augment=0.12),
    optim=Optim(
        learning_rate=1e-3,
        warmup_steps=1000,
        schedule="cosine",
        grad_clip=1.0,
        ema_decay=(0.9999, 0.9993),
    ),
    train=Train(
        steps=390_000,
        batch_size=512,
        dtype="bfloat16",
        sample_every=20_000,
        checkpoint_every=20_000,
        keep_every=100_000,
    ),
)
