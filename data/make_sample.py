"""Writes the sample in data/raw: customers' messages, each with the one JSON object that a shop's system would file.

    python data/make_sample.py data/raw

The rows have BELLE's columns (instruction, input, output). Two thirds are Chinese (zh.json, one object a line, as BELLE
publishes its files) and one third is English (en.json, one array). The answer follows from the message alone: what the
customer wants, which goods, how many as a digit, and the city if one is named. Wordings, goods, counts and cities are
drawn independently, so a test message has neighbours in the training rows but never its own answer among them.
The same Python code and SEED give the same bytes.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20261124
ROWS = {"zh": 1070, "en": 530}

INSTRUCTION = {"zh": "转成JSON：", "en": "Turn into JSON: "}

# A wording holds {n} (a count with its measure word), {item} and, in the second list, {city}.
WORDINGS = {
    "zh": {
        "buy": (
            ["我想买{n}{item}。", "给我来{n}{item}吧", "请问{item}还有吗？要{n}。", "下单{n}{item}，谢谢", "再加{n}{item}"],
            ["{n}{item}，送到{city}。", "我在{city}，想订{n}{item}", "麻烦寄{n}{item}去{city}", "{city}要{n}{item}，尽快"],
        ),
        "refund": (
            ["{n}{item}都坏了，退钱！", "这{n}{item}我要退款", "{item}质量太差，{n}全退了", "钱退给我，{n}{item}不要了"],
            ["{city}的{n}{item}申请退款", "寄到{city}的{n}{item}破了，退钱", "{item}没到{city}，{n}退款吧"],
        ),
        "exchange": (
            ["{n}{item}尺寸不对，想换", "能换{n}{item}吗？", "{item}颜色发错了，{n}帮我换", "请换货，{n}{item}有划痕"],
            ["{city}收到的{n}{item}要换货", "我在{city}，{n}{item}想换一下", "{n}{item}换好寄回{city}"],
        ),
        "track": (
            ["我的{n}{item}到哪了？", "{n}{item}发货了没", "查一下{n}{item}的物流", "{item}怎么还没到，一共{n}"],
            ["去{city}的{n}{item}走到哪了", "{n}{item}几天到{city}？", "查物流：{city}，{n}{item}"],
        ),
        "cancel": (
            ["{n}{item}先不买了", "取消订单，{n}{item}", "那{n}{item}别发了", "我后悔了，{n}{item}取消"],
            ["发{city}的{n}{item}取消吧", "{city}那单{n}{item}不要发", "别寄{city}了，{n}{item}取消"],
        ),
    },
    "en": {
        "buy": (
            ["I'd like {n} {item}.", "Can I get {n} {item}?", "Please add {n} {item} to my cart", "{n} {item}, please!"],
            ["Send {n} {item} to {city}.", "I'm in {city} and need {n} {item}", "{n} {item} for {city}, asap"],
        ),
        "refund": (
            ["My {n} {item} broke, money back!", "I want a refund for {n} {item}", "Refund me: {n} {item}, awful quality"],
            ["The {n} {item} sent to {city} are broken, pay me back", "Refund {n} {item}, order from {city}"],
        ),
        "exchange": (
            ["Wrong size, can I swap {n} {item}?", "Please exchange {n} {item}", "{n} {item} came in the wrong color, swap"],
            ["Swap {n} {item}, I live in {city}", "Exchange {n} {item} delivered to {city}"],
        ),
        "track": (
            ["Where are my {n} {item}?", "Have the {n} {item} shipped yet?", "Still waiting for {n} {item}"],
            ["When do {n} {item} reach {city}?", "Track {n} {item} on the way to {city}"],
        ),
        "cancel": (
            ["Don't send the {n} {item}", "Cancel my order of {n} {item}", "I changed my mind, no {n} {item}"],
            ["Cancel {n} {item} for {city}", "Stop the {n} {item} going to {city}"],
        ),
    },
}

# Chinese goods stand with their measure word, since a count is never written without one.
ITEMS = {
    "zh": (
        "雨伞:把 手机:部 水杯:个 台灯:盏 毛巾:条 牙刷:支 书包:个 耳机:副 键盘:个 鼠标:个 衬衫:件 外套:件 裤子:条 袜子:双 球鞋:双 "
        "帽子:顶 围巾:条 手套:副 枕头:个 被子:床 椅子:把 书架:个 茶壶:把 碗:个 盘子:个 锅:口 菜刀:把 苹果:斤 香蕉:斤 牛奶:箱 "
        "咖啡:盒 面包:袋 饼干:包 大米:袋 鸡蛋:盒 日历:本 钢笔:支 相机:台 音箱:台 电池:节 轮胎:个 地毯:块 窗帘:副 镜子:面 风筝:只"
    ),
    "en": (
        "umbrellas phones cups lamps towels toothbrushes backpacks headphones keyboards mice shirts jackets socks shoes hats "
        "scarves gloves pillows blankets chairs shelves teapots bowls plates pans knives apples bananas notebooks pens cameras "
        "speakers batteries tires carpets curtains mirrors kites clocks candles"
    ),
}
CITIES = {
    "zh": (
        "北京 上海 广州 深圳 成都 重庆 西安 武汉 南京 杭州 苏州 天津 长沙 郑州 青岛 大连 厦门 昆明 沈阳 济南 合肥 福州 南昌 贵阳 太原 "
        "兰州 海口 拉萨 银川 西宁 桂林 洛阳 扬州 珠海 三亚 无锡 宁波 温州 烟台 唐山"
    ),
    "en": (
        "London Paris Berlin Madrid Rome Vienna Prague Dublin Oslo Lisbon Athens Warsaw Boston Chicago Denver Dallas Seattle "
        "Austin Miami Toronto Sydney Tokyo Seoul Delhi Cairo Lima Nairobi Munich Milan Geneva"
    ),
}
COUNTS = {
    "zh": dict(zip("一两三四五六七八九", range(1, 10), strict=True)) | {"十": 10, "十二": 12, "二十": 20},
    "en": dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], range(2, 11), strict=True))
    | {"twelve": 12, "twenty": 20, "a dozen": 12},
}


def draw(language: str, rng: random.Random) -> dict[str, str]:
    """One row in BELLE's columns."""
    wordings = WORDINGS[language]
    intent = rng.choice(sorted(wordings))
    with_city = rng.random() < 0.5
    words = rng.choice(list(COUNTS[language]))
    item, _, measure = rng.choice(ITEMS[language].split()).partition(":")
    city = rng.choice(CITIES[language].split())
    message = rng.choice(wordings[intent][with_city]).format(n=words + measure, item=item, city=city)
    answer: dict[str, str | int] = {"intent": intent, "item": item, "count": COUNTS[language][words]}
    if with_city:
        answer["city"] = city
    output = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return {"instruction": INSTRUCTION[language], "input": message[0].upper() + message[1:], "output": output}


def rows(language: str) -> list[dict[str, str]]:
    """The language's rows, no message twice."""
    rng = random.Random(f"{SEED} {language}")
    drawn: dict[str, dict[str, str]] = {}
    while len(drawn) < ROWS[language]:
        row = draw(language, rng)
        drawn.setdefault(row["input"], row)
    return list(drawn.values())


def main(folder: Path) -> None:
    zh = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows("zh"))
    (folder / "zh.json").write_text(zh, encoding="utf-8", newline="\n")
    en = json.dumps(rows("en"), ensure_ascii=False, indent=1) + "\n"
    (folder / "en.json").write_text(en, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
