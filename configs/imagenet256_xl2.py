"""DiT-XL/2 on 256x256 ImageNet latents, the paper's recipe: python train.py imagenet256_xl2

Hardware: 8 H100 or A100, a TPU v5e-8, or a multiple: 8 devices share the parameters, --mesh.fsdp
says how many. Expect (paper, Table 4, 400K steps, no guidance): FID-50K 19.47.
"""

from dit.config import PRESETS, Config, Data, Mesh, Model, Optim, Train

config = Config(
    name="imagenet256_xl2",
    model=Model(**PRESETS["DiT-XL/2"], remat="dots"),
    data=Data(
        name="imagenet2012",
        image_size=256,
        channels=3,
        num_classes=1000,
        latents="latents/imagenet256",
        flip=True,
    ),
    optim=Optim(learning_rate=1e-4, ema_decay=0.9999),
    mesh=Mesh(fsdp=8),
    train=Train(steps=400_000, batch_size=256, dtype="bfloat16"),
)
