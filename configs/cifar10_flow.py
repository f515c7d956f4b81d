"""A DiT-S/2 on the pixels of CIFAR-10 by flow matching: python train.py cifar10_flow

Hardware: one GPU. TFDS downloads the data, 170 MB, the first time.
"""

from dit.config import PRESETS, Config, Data, Model, Objective, Optim, Train

config = Config(
    name="cifar10_flow",
    model=Model(**PRESETS["DiT-S/2"], remat="dots"),
    # JiT's times on pixels, of more noise; its t runs the other way, so that its mean is -0.8
    objective=Objective(name="flow", time_mean=0.8, time_std=0.8),
    data=Data(name="cifar10", image_size=32, channels=3, num_classes=10, flip=True),
    optim=Optim(learning_rate=3e-4, warmup_steps=1000, grad_clip=1.0, ema_decay=0.9999),
    train=Train(
        steps=100_000,
        batch_size=256,
        dtype="bfloat16",
        sample_every=5000,
        checkpoint_every=5000,
        keep_every=50_000,
    ),
)
