"""A DiT-S/2 on the pixels of CIFAR-10: python train.py cifar10

Hardware: one GPU. TFDS downloads the data, 170 MB, the first time. 26 million images: by plan.py's
bound of 27,225 images/s at least 16 minutes of an H100, and 40 at 40 % MFU. Not run yet.
"""

from dit.config import PRESETS, Config, Data, Model, Objective, Optim, Train

config = Config(
    name="cifar10",
    model=Model(**PRESETS["DiT-S/2"], remat="dots"),
    # the linear schedule, made for larger images, spends a third of its steps on pure noise
    objective=Objective(schedule="cosine"),
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
