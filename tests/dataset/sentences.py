"""Text that several tests train tokenizers on."""

ENGLISH = [
    "The old man walked slowly to the river, and there he sat down to think about his children.",
    "She did not know what to say, so she smiled and asked him whether he would like some tea.",
    "In the morning the streets were full of people who had come to see the new king.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "A computer program is a list of instructions which tells the machine what it should do next.",
    "I don't think we've met before; I'm a teacher at the school near the station.",
]
CHINESE = [
    "今天天气很好，我们一起去公园散步，看到很多人在湖边唱歌跳舞。",
    "他说自己从小就喜欢读书，可是家里没有钱，只好到城里去做工。",
    "人工智能可以帮助我们解决很多问题，但是也需要注意安全。",
    "如果你感到压力很大，可以试着和朋友聊一聊，或者出去运动一下。",
    "公司应当按照国家有关规定建立健全管理制度，并向主管部门报告。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
]
CHAT = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "答案是 42。\n\nThat's it."},
]
