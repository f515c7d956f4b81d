"""DiT-B/2 on 256x256 ImageNet latents, the paper's recipe: python train.py imagenet256_b2

Hardware: 8 GPUs or a TPU v5e-8. Expect (paper, Table 4, 400K steps, no guidance): FID-50K 43.47.
"""

from dit.config import PRESETS, Config, Data, Model, Optim, Train

config = Config(
    name="imagenet256_b2",
    model=Model(**PRESETS["DiT-B/2"], remat="dots"),
    data=Data(
        name="imagenet2012",
        image_size=256,
        channels=3,
        num_classes=1000,
        latents="latents/imagenet256",
        flip=True,
    ),
    optim=Optim(learning_rate=1e-4, ema_decay=0.9999),
    train=Train(steps=400_000, batch_size=256, dtype="bfloat16"),
)
