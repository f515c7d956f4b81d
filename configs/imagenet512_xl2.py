"""DiT-XL/2 on 512x512 ImageNet latents, the paper's recipe: python train.py imagenet512_xl2

Hardware: 8 H100, or a multiple: 8 devices share the parameters, --mesh.fsdp says how many. Expect
(paper, section 5.1, 3M steps, guidance 1.5): FID-50K 3.04. The smaller models train at 512x512 by
`imagenet256_b2 --data.image-size 512 --data.latents latents/imagenet512`.
"""

from dit.config import PRESETS, Config, Data, Mesh, Model, Optim, Train

config = Config(
    name="imagenet512_xl2",
    model=Model(**PRESETS["DiT-XL/2"], remat="dots"),
    data=Data(
        name="imagenet2012",
        image_size=512,
        channels=3,
        num_classes=1000,
        latents="latents/imagenet512",
        flip=True,
    ),
    optim=Optim(learning_rate=1e-4, ema_decay=0.9999),
    mesh=Mesh(fsdp=8),
    train=Train(steps=3_000_000, batch_size=256, dtype="bfloat16"),
)
