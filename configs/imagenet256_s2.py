"""DiT-S/2 on 256x256 ImageNet latents, the paper's recipe: python train.py imagenet256_s2

Hardware: one GPU. Expect (paper, Table 4, 400K steps, no guidance): FID-50K 68.40.
Patch sizes 4 and 8 are --model.patch-size 4 and 8.
"""

from dit.config import PRESETS, Config, Data, Model, Optim, Train

config = Config(
    name="imagenet256_s2",
    model=Model(**PRESETS["DiT-S/2"], remat="dots"),
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
