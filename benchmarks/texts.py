"""BELLE-like rows of any number: instructions and answers in Chinese and English, made of word lists.

The words are common ones by Zipf's law, and rare ones composed of syllables, so that a tokenizer and a search for similar
prompts meet a vocabulary as large as that of a language. The sentences mean nothing.
"""

import bisect
import itertools
import json
import math
import random
from pathlib import Path

LANGUAGES = ("zh", "zh", "en")
"""Two thirds of the rows are Chinese."""
ANSWER_TOKENS, PROMPT_TOKENS, SIGMA = 110, 45, 0.8
"""Median tokens of an answer and of an instruction, and the standard deviation of their logarithm, which is normal."""
TOKENS_PER_UNIT = {"zh": 1.11, "en": 1.17}
"""Tokens of Qwen's tokenizer per word or punctuation mark of these texts."""
RARE_SHARE = 0.08
WITH_INPUT = 0.25
"""Share of the rows with an input."""

COMMON = {
    "en": """the of to and a in is that it for as with on are be by this was or from can at have not an which they
    also will more when one their has but we you other some time may two than should these most such into about many
    used new only how make people work between often first use each help good different year way world water part
    need example important provide information health food system energy data learning change history problem number
    language family school city product service market company student teacher model method result idea plan design
    music story book paper letter river mountain garden kitchen window street train bridge island weather season
    summer winter morning evening colour light sound voice heart mind body hand face friend child parent doctor
    nurse farmer driver artist writer engineer scientist research science nature animal plant forest tree flower
    bird fish horse climate ocean desert planet space star moon sun road journey travel hotel ticket price money
    bank tax law rule right duty peace war army king queen nation country village house room door table chair bed
    lamp phone computer network program code test error machine engine wheel metal wood glass stone paint cloth
    shirt shoe coat bag bread rice meat fruit apple lemon sugar salt oil tea coffee milk egg soup cake begin build
    bring buy call carry choose compare create describe develop discover draw explain find follow give grow hear
    improve include increase keep know learn leave listen look measure move open order pay play prepare prevent
    protect reach read reduce remember remove replace save say sell send serve share show sing sleep speak spend
    start stop study support teach think try understand visit wait walk want warn wash watch wear win wish write
    simple clear strong early late young old long short high low deep wide warm cold dry wet fast slow easy hard
    rich poor safe quiet loud bright dark fresh clean sweet bitter local global public private common rare modern
    ancient natural digital daily weekly main recent several possible necessary useful careful beautiful popular
    serious similar general special economic social cultural political physical mental personal technical
    traditional northern southern eastern western central""",
    "zh": """的 了 是 在 和 我们 一个 可以 有 不 这 也 人 都 对 中 上 他们 与 将 就 为 更 会 能 以及 需要 通过 因为
    所以 如果 但是 例如 同时 其中 非常 可能 应该 使用 提高 重要 学习 工作 生活 时间 问题 方法 社会 发展 技术 数据
    信息 系统 环境 健康 文化 历史 教育 经济 科学 自然 世界 国家 城市 家庭 学校 学生 老师 孩子 朋友 父母 医生 作者
    公司 产品 服务 市场 客户 项目 计划 目标 结果 过程 方式 能力 知识 经验 语言 文章 故事 音乐 电影 艺术 设计 颜色
    声音 食物 水果 蔬菜 米饭 面条 茶叶 咖啡 牛奶 鸡蛋 蛋糕 身体 运动 睡眠 心情 压力 习惯 关系 感情 梦想 希望 成功
    失败 机会 挑战 选择 决定 变化 影响 原因 特点 优势 缺点 价格 质量 安全 速度 温度 天气 春天 夏天 秋天 冬天 早晨
    晚上 今天 明天 昨天 去年 未来 太阳 月亮 星星 天空 大海 河流 高山 森林 草原 沙漠 动物 植物 花朵 小鸟 老虎 熊猫
    大象 机器 电脑 手机 网络 程序 代码 模型 算法 函数 文件 图片 视频 新闻 报告 会议 旅行 火车 飞机 汽车 道路 桥梁
    建筑 房间 窗户 桌子 椅子 衣服 鞋子 颜料 木头 石头 金属 玻璃 能源 电力 石油 气候 污染 保护 建立 创造 改善 分析
    比较 解释 描述 介绍 推荐 帮助 支持 合作 交流 沟通 理解 思考 记录 检查 测试 管理 控制 减少 增加 避免 解决 完成
    开始 结束 保持 注意 享受 分享 学会 阅读 写作 翻译 计算 回答 提问 讨论 研究 发现 证明 快乐 美丽 简单 复杂 困难
    容易 丰富 独特 传统 现代 古老 新鲜 温暖 寒冷 安静 热闹 明亮 黑暗 勇敢 善良 聪明 努力 认真 积极 专业 个人 公共
    全球 当地 主要 基本 不同 相同 许多 一些 每个""",
}
SYLLABLES = "ka ro mi ten sal vor lin da per nu gra shel bo rin tas el mor qui fen dal is or ven ta"
RARE_WORDS = 20_000
INSTRUCTIONS = {
    "en": (
        "Write a short text about {}.",
        "Explain {} to a beginner.",
        "What is the difference between {} and {}?",
        "Give five tips on {}.",
        "Summarize in one sentence: {}",
        "How does {} work?",
        "Translate into Chinese: {}",
        "Write a poem about {}, and mention {}.",
    ),
    "zh": (
        "写一篇关于{}的短文。",
        "请解释{}是什么意思？",
        "{}和{}有什么区别？",
        "给出五条关于{}的建议。",
        "用一句话概括：{}",
        "把这句话翻译成英文：{}",
        "请为{}写一段介绍。",
        "根据{}写一首诗，提到{}。",
    ),
}


class Texts:
    """Texts in one language."""

    def __init__(self, language: str, rng: random.Random) -> None:
        self._rng = rng
        self.language = language
        self._space, self._stop, self._comma = ("", "。", "，") if language == "zh" else (" ", ".", ",")
        common = COMMON[language].split()
        parts = sorted(set("".join(common))) if language == "zh" else SYLLABLES.split()
        rare = ["".join(rng.choices(parts, k=rng.choice((2, 2, 3)))) for _ in range(RARE_WORDS)]
        self._words = common + rare
        weights = [1 / (n + 3) for n in range(len(common))]
        weights += [RARE_SHARE / (1 - RARE_SHARE) * sum(weights) / len(rare)] * len(rare)
        self._cumulative = list(itertools.accumulate(weights))

    def words(self, count: int) -> list[str]:
        pick, cumulative, words, total = self._rng.random, self._cumulative, self._words, self._cumulative[-1]
        return [words[bisect.bisect(cumulative, pick() * total)] for _ in range(count)]

    def text(self, tokens: float) -> str:
        """Sentences of about that many tokens, in paragraphs."""
        left = max(1, round(tokens / TOKENS_PER_UNIT[self.language]))
        text = ""
        while left > 0:
            count = min(left, self._rng.randint(7, 18))
            words = self.words(count)
            if count > 9:
                words[count // 2] += self._comma
            sentence = self._space.join(words) + self._stop
            end = "\n" if self._rng.random() < 0.15 else self._space
            text += (sentence[0].upper() + sentence[1:]) + end
            left -= count + 1
        return text.strip()

    def length(self, median: float) -> float:
        return self._rng.lognormvariate(math.log(median), SIGMA)

    def row(self) -> dict[str, str]:
        wanted = self.length(PROMPT_TOKENS)
        form = self._rng.choice(INSTRUCTIONS[self.language])
        with_input = self._rng.random() < WITH_INPUT
        topics = [
            self.text(1 if with_input else wanted / form.count("{}")).rstrip(self._stop) for _ in range(form.count("{}"))
        ]
        return {
            "instruction": form.format(*topics),
            "input": self.text(wanted) if with_input else "",
            "output": self.text(self.length(ANSWER_TOKENS)),
        }

    def changed(self, text: str, share: float) -> str:
        """A text in which a share of the words is another: an answer that is nearly the reference."""
        units = list(text) if self.language == "zh" else text.split(" ")
        for place in self._rng.sample(range(len(units)), round(share * len(units))):
            units[place] = self.words(1)[0]
        return self._space.join(units)


def make_texts(seed: int) -> dict[str, Texts]:
    rng = random.Random(seed)
    return {language: Texts(language, rng) for language in COMMON}


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Writes rows in BELLE's format, as JSON lines. The same count and seed give the same bytes."""
    texts = make_texts(seed)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            row = texts[LANGUAGES[number % len(LANGUAGES)]].row()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
